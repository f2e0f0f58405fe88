"""From a dense model and samples to a plan: statistics, the head rule, the search."""
