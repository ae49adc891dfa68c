"""Analysis of subnets: angle tables, scores, random pruning, and the statistics to judge them by."""
