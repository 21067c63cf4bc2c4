"""The method: lambda times what adapting the source changes, added to what the target denoises."""
