"""Live migration of a guest's RAM and its balloon device, in rounds, with free page hints.

`Migration` sends, `Receiver` receives, `stream` is what lies between them: the same bytes on a socket and in a file.
"""
