"""Trains a VideoSAUR slot encoder on videos, over a frozen DINOv2: a folder of videos, tar shards, a dataset, or (by
default) our Push-T.

    accelerate launch --config_file examples/accelerate/gpu_ddp.yaml examples/train_videosaur.py \
        examples/videosaur/push_t.yaml --output_dir runs/videosaur --num_workers 8

    python examples/train_videosaur.py examples/videosaur/push_t_small.yaml --output_dir runs/videosaur_small

The same command continues an interrupted run. `--help` lists every argument (those of the training and every field of
`VideoSaurConfig`); a .yaml or .json file of them may come first, as those in examples/videosaur/.
"""

from cjepa_hf.training.videosaur import main

if __name__ == "__main__":
    main()
