"""Trains an autoregressive baseline: DINO-WM on patch tokens, or OC-DINO-WM on slots (`--token_type slots`).

    python examples/make_patch_encoder.py --episodes runs/episodes --output_dir runs/patches
    cjepa-hf extract runs/episodes --encoder runs/patches --dtype float16 --output-dir runs/patch_tokens
    python examples/train_dino_wm.py --dataset runs/patch_tokens --slot_encoder runs/patches --output_dir runs/dino_wm

    python examples/train_dino_wm.py --token_type slots --dataset runs/slots --slot_encoder runs/encoder \
        --output_dir runs/oc_dino_wm

The same command continues an interrupted run. `--help` lists every argument (those of examples/train.py, and every field of
`DinoWmConfig`); a .yaml or .json file of them may come first. `cjepa-hf train dino-wm` runs the same code.
"""

from cjepa_hf.training.dino_wm import main

if __name__ == "__main__":
    main()
