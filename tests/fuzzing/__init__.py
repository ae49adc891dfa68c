"""What breaks it? Random nets, damaged files and wrong arguments, made from seeds (see tools/fuzz.py)."""
