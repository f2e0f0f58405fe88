"""The mathematics of a pruned pass: layouts, packed rows, attention, the cache. Knows no class of
transformers."""
