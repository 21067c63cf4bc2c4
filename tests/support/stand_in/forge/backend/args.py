"""What Forge was started with."""

dynamic_args = {"embedding_dir": None}
