"""Gate first, then traffic, time and hardware counters.  [floor 3]"""
