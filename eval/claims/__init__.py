"""What the paper claims, tested on one router: do learned skips follow the theory, and what do single inputs get?"""
