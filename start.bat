@echo off
rem Finds Python 3.11 or newer and runs start.py, which sets everything up.
cd /d "%~dp0"
for %%V in (3.13 3.12 3.11 3) do (
  py -%%V -c "import sys; sys.exit(sys.version_info < (3, 11))" >nul 2>nul && (
    py -%%V start.py %*
    goto end
  )
)
python -c "import sys; sys.exit(sys.version_info < (3, 11))" >nul 2>nul && (
  python start.py %*
  goto end
)
echo Python 3.11 or newer was not found. Install it from https://www.python.org/downloads/ and start this again.
:end
pause
