"""Trains a C-JEPA world model on a slot dataset (a folder, or a dataset repository on the Hub).

    python examples/train.py --dataset runs/slots --output_dir runs/world_model

    accelerate launch --config_file examples/accelerate/gpu_ddp.yaml examples/train.py --dataset runs/slots \
        --output_dir runs/world_model --max_steps 20000 --mixed_precision bf16 --num_workers 4

The same command continues an interrupted run. `--help` lists every argument (those of the training and every field of
`CJepaConfig`); a .yaml or .json file of them may come first. `cjepa-hf train` runs the same code.
"""

from cjepa_hf.training.cjepa import main

if __name__ == "__main__":
    main()
