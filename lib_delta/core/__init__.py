"""The method: the source's delta, times lambda, is added to the target's denoised estimate."""
