from . import advantages as advantages
from . import estimators as estimators
from . import returns as returns
