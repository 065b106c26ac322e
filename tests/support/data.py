"""The accounts and teams in every test database, and two persons as an integration sends them."""

ACCOUNT, TEAM = 123, 42
OTHER_ACCOUNT, OTHER_TEAM = 999, 77
PORTAL = "https://portal.example/start"
PAGE = f"/client/{ACCOUNT}/t/{TEAM}/posts"
JANE = {"email": "jane.doe@example.com", "first_name": "Jane", "last_name": "Doe"}
JOHN = {"email": "john.roe@example.com", "first_name": "John", "last_name": "Roe"}
