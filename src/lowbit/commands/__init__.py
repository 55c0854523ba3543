"""The commands of `quantize`, one file each. Nothing heavy is imported at module level, so that help is instant."""
