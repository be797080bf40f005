"""HTTP service that segments images, and its page; needs the extra ``[web]``."""
