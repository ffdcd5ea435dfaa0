"""Evaluations of labels and models (`cai eval`)."""
