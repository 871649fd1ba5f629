"""Mutation tests: each mutant breaks one rule of the product, and some test must fail because of it."""
