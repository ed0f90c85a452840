"Says where the tutorial is, with links into the project; Cloudera ML runs it as the last step of setting up the AMP."
import os
from pathlib import Path

def project_page():
    "The project's address for a browser; \"\" where this isn't Cloudera ML."
    parts = os.environ.get("CDSW_PROJECT_URL", "").split("/")  # https: // domain / api / v1 / projects / owner / project
    domain = os.environ.get("CDSW_DOMAIN", "")
    return f"{parts[0]}//{domain}/{parts[-2]}/{parts[-1]}" if domain and len(parts) > 6 else ""

def number_and_title(path):
    "Of a notebook such as 10_follow_a_row."
    number, title = path.stem.split("_", 1)
    return int(number), title.replace("_", " ")

def tutorial_links():
    "(title, address or path) of each tutorial, in order."
    page = project_page()
    notebooks = sorted(Path("nbs/tutorials").glob("[0-9]*_*.ipynb"), key=number_and_title)
    return [(number_and_title(path)[1], f"{page}/files/{path.as_posix()}" if page else path.as_posix()) for path in notebooks]

if __name__ == "__main__":
    print("Start a session with JupyterLab, and open the tutorials from the top:")
    for title, link in tutorial_links(): print(f"  {title}: {link}")
    if "IPython" in __import__("sys").modules:
        from IPython.display import HTML, display
        display(HTML("<ol>" + "".join(f'<li><a href="{link}" target="_blank">{title}</a></li>' for title, link in tutorial_links()) + "</ol>"))
