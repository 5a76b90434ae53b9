"""The label assistant: what is in several datasets, and where their labels may agree, clash or leave out.

It only suggests. Nothing is joined, renamed or left out unless a person writes so in a datasets file.
"""
