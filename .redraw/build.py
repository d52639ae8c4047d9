"""Put the pieces of the new house together."""
import pathlib
here = pathlib.Path(__file__).parent
example = (here.parent / "config.example.yaml").read_text() if not (here/"config.example.yaml").exists() else (here/"config.example.yaml").read_text()
def piece(n):
    p = here / f"p{n}.py"
    return p.read_text() if p.exists() else ""
text = "".join(piece(n) for n in ("1","2","3","4","5","6","6b","7","8","9a","9b","9c","9d","10"))
text = text.replace("@@EXAMPLE@@", example.replace("\\", "\\\\"))
(here / "teckochecker.py").write_text(text)
