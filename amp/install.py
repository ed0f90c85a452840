"Installs this project into itself; Cloudera ML runs it in a session, from the project's folder, when the AMP is set up."
import subprocess, sys

subprocess.run([sys.executable, "-m", "pip", "install", "--no-cache-dir", "-e", "."], check=True)
