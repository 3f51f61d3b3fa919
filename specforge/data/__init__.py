"""Conversations to batches: sources -> chat -> template -> encoding -> rows (cached) -> packing -> loader -> module."""
