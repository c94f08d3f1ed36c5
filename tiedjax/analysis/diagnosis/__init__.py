"""The page of `tiedjax diagnose`: what tying did to one model, without a twin."""
