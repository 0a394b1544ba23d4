"""Commands that only print: recipes with their cost, tasks, encoders, what a recipe needs, what this machine has."""
