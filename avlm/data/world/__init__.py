"""A small made-up world: pictures, speech, sounds and videos to train on, made on the spot.

Nothing is downloaded. ``avlm.data.world.build.make_world`` is the door; this file imports
nothing, so that the speech process starts without the rest.
"""
