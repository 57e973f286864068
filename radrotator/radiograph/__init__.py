"File ↔ radiograph. A `Radiograph` crops, reads and writes itself, whichever room of this wing it was taken from."
from . import borders, read, write
