"""Small faults, put in one at a time: do the tests see them?"""
