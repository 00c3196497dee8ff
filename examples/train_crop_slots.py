"""Trains the slot encoder of the collision world: it follows objects of any color in front of a constant background.

    cjepa-hf collect collisions --output-dir runs/frames --episodes 1000 --validation-episodes 40 --frames 64
    python examples/train_crop_slots.py --dataset runs/frames --output_dir runs/encoder

The same command continues an interrupted run. `--help` lists every argument (those of the training and every field of
`CropSlotsConfig`); a .yaml or .json file of them may come first. `cjepa-hf train crop-slots` runs the same code. What it
assumes of the videos: see the docstring of `cjepa_hf.models.crop_slots.modeling_crop_slots`.
"""

from cjepa_hf.training.crop_slots import main

if __name__ == "__main__":
    main()
