"""Packages of the extra [export]."""


def check_packages(*names: str) -> None:
    """Raise ``RuntimeError`` if a package is not installed."""
    for name in names:
        try:
            __import__(name)
        except ImportError as error:
            raise RuntimeError(f'the export to ONNX requires {name}; run: pip install "spar_d2[export]"') from error
