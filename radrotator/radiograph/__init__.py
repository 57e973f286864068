"File ↔ radiograph. A `Radiograph` reads and writes itself, whichever room of this wing it was taken from."
from . import read, write
