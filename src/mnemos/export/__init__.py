"""Models in other runtimes' formats, each compared with the original before the file keeps its name."""
