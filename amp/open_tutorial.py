"Says where the tutorial is, with links into the project; Cloudera ML runs it as the last step of setting up the AMP."
import os
from pathlib import Path

def project_page():
    "The project's address for a browser; \"\" where this isn't Cloudera ML."
    parts = os.environ.get("CDSW_PROJECT_URL", "").split("/")  # https: // domain / api / v1 / projects / owner / project
    domain = os.environ.get("CDSW_DOMAIN", "")
    return f"{parts[0]}//{domain}/{parts[-2]}/{parts[-1]}" if domain and len(parts) > 6 else ""

def tutorial_links():
    "(title, address or path) of each tutorial, in order."
    page, folder = project_page(), Path("nbs/tutorials")
    return [(path.stem[2:].replace("_", " "), f"{page}/files/{path.as_posix()}" if page else path.as_posix()) for path in sorted(folder.glob("[0-9]*.ipynb"))]

if __name__ == "__main__":
    print("Start a session with JupyterLab, and open the tutorials from the top:")
    for title, link in tutorial_links(): print(f"  {title}: {link}")
    if "IPython" in __import__("sys").modules:
        from IPython.display import HTML, display
        display(HTML("<ol>" + "".join(f'<li><a href="{link}" target="_blank">{title}</a></li>' for title, link in tutorial_links()) + "</ol>"))
