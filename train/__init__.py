"""CLIP training under frozen recipes. Runs without ray, polars and faiss; only launch.py needs ray."""
