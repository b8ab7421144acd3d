"""Tool calls and reasoning: how families of models write them, how they are read and how they are forced."""
