"""Which relevance maps are better: methods run on a data set, measured, compared with statistics, and reported.

`run.evaluate` measures, `statistics.analyse` compares, `report.write` reports; `fga-fast evaluate` does all three.
"""
