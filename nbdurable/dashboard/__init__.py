"""The pages: a process of its own that shows runs and takes decisions, as a client of the coordinator's API.

Never opens the store and never unpickles. Start it with `python -m nbdurable.dashboard`; `Home.dashboard`
says where it is.
"""
