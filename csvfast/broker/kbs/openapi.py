def openapi(): return {}
