"""Models assembled from sma's parts: SeqBoat, MEGA and hybrids, with heads for classification, language modelling and
retrieval.
"""
