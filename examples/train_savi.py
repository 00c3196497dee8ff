"""Trains a SAVi slot encoder on videos: a folder of them, tar shards, a dataset, or (by default) our Push-T.

    python examples/train_savi.py examples/savi/push_t_small.yaml --output_dir runs/savi

    accelerate launch --config_file examples/accelerate/gpu_ddp.yaml examples/train_savi.py examples/savi/clevrer.yaml \
        --dataset path/to/clevrer --output_dir runs/savi_clevrer --num_workers 8

The same command continues an interrupted run. `--help` lists every argument (those of the training and every field of
`SaviConfig`); a .yaml or .json file of them may come first, as those in examples/savi/.
"""

from cjepa_hf.training.savi import main

if __name__ == "__main__":
    main()
