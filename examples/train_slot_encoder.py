"""Trains the slot encoder that turns Push-T frames into slots (about a quarter of an hour on one CPU core).

    python examples/train_slot_encoder.py --output_dir runs/encoder

    python examples/train_slot_encoder.py --output_dir runs/my_encoder --dataset my_frames --column image --num_slots 5

The same command continues an interrupted run. `--help` lists every argument; a .yaml or .json file of them may come
first. `cjepa-hf train color-isa` runs the same code. The encoder tells objects apart by their colors: see the docstring
of `cjepa_hf.models.color_isa`.
"""

from cjepa_hf.training.color_isa import main

if __name__ == "__main__":
    main()
