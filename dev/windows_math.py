"""C sources of the library that numpy lacks under Wine: python dev/windows_math.py FOLDER_OF_PACKAGES

Windows' C runtime has the complex functions of C99, Wine's has not, and numpy cannot be imported without them. `math.c` and `math.def` are
written into the current folder: a library that computes the complex functions by MinGW's and forwards every other name that a package asks
`api-ms-win-crt-math` for to the runtime. docs/development/windows.md tells how it is built and put in place.
"""

import re
import subprocess
import sys
from pathlib import Path

LIBRARY = "apx-ms-win-crt-math-l1-1-0.dll"
_DUMP = ("x86_64-w64-mingw32-objdump", "-p")
_BASES = (
    *("creal", "cimag", "cabs", "carg", "conj", "cproj", "cexp", "clog", "cpow", "csqrt"),
    *("csin", "ccos", "ctan", "casin", "cacos", "catan", "csinh", "ccosh", "ctanh", "casinh", "cacosh", "catanh"),
)
_COMPLEX = {base + suffix: (base, suffix) for base in _BASES for suffix in ("", "f", "l")}
_REAL = ("creal", "cimag", "cabs", "carg")
_HEAD = """\
#include <complex.h>
typedef struct { float part[2]; } Float;
typedef struct { double part[2]; } Double;
"""


def main(folder: Path) -> None:
    names = set().union(*(imported(path) for path in sorted(folder.rglob("*")) if path.suffix in (".pyd", ".dll")))
    own = sorted(names & _COMPLEX.keys())
    Path("math.c").write_text(_HEAD + "".join(map(function, own)), encoding="utf-8")
    exports = [f"{name} = x_{name}" if name in own else f"{name} = ucrtbase.{name}" for name in sorted(names)]
    Path("math.def").write_text("\n".join([f'LIBRARY "{LIBRARY}"', "EXPORTS", *exports]) + "\n", encoding="utf-8")
    print(f"{len(names)} functions, {len(own)} of them complex")


def imported(path: Path) -> set[str]:
    """Functions that a library takes from the runtime's part for mathematics."""
    dump = subprocess.run([*_DUMP, str(path)], capture_output=True, text=True, errors="replace", check=True).stdout
    names: set[str] = set()
    for table in re.split(r"^\s*DLL Name: ", dump, flags=re.MULTILINE)[1:]:
        if table.startswith("api-ms-win-crt-math"):
            rows = table.split("\n\n")[0].splitlines()[1:]
            names |= {row.split()[-1] for row in rows if re.match(r"\s+[0-9a-f]+\s+(<none>|\d+|[0-9a-f]+)\s.*[a-z_]\w*$", row)}
    return {name for name in names if not re.fullmatch(r"[0-9a-f]{8}", name)}


def function(name: str) -> str:
    """One function in C. Windows passes complex numbers as structures, and its `long double` is a `double`."""
    base, suffix = _COMPLEX[name]
    kind, number = ("Float", "float") if suffix == "f" else ("Double", "double")
    f = "f" if suffix == "f" else ""
    load = "({number} complex)({value}.part[0] + {value}.part[1] * I)"
    values = ("a", "b") if base == "cpow" else ("a",)
    given = ", ".join(f"{kind} {value}" for value in values)
    call = f"{base}{f}({', '.join(load.format(number=number, value=value) for value in values)})"
    if base in _REAL:
        return f"{number} x_{name}({given}) {{ return {call}; }}\n"
    return f"{kind} x_{name}({given}) {{ {number} complex r = {call}; {kind} o = {{{{creal{f}(r), cimag{f}(r)}}}}; return o; }}\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
