-- The receiver's store. Times are milliseconds since the Unix epoch (UTC) in columns named *_ms; money is
-- decimal text; sizes are bytes. Ids come from AUTOINCREMENT, so that one is never given out twice.

CREATE TABLE companies (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'suspended')),
    -- Public key made offline; the receiver never sees the secret one.
    recovery_recipient TEXT NOT NULL,
    recovery_fingerprint TEXT NOT NULL,
    created_at_ms INTEGER NOT NULL
) STRICT;

CREATE TABLE servers (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    company_id INTEGER NOT NULL REFERENCES companies (id),
    name TEXT NOT NULL,
    status TEXT NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'quarantined', 'revoked')),
    env TEXT,
    region TEXT,
    labels_json TEXT NOT NULL DEFAULT '{}',
    -- SHA-256 of the key that speaks for this server, and of one that a renewal announced.
    spki_sha256 TEXT NOT NULL UNIQUE,
    next_spki_sha256 TEXT UNIQUE,
    agent_version TEXT NOT NULL DEFAULT '',
    separated INTEGER NOT NULL DEFAULT 0,
    enrolled_at_ms INTEGER NOT NULL,
    last_seen_ms INTEGER,
    -- The agent's clock minus ours.
    clock_skew_ms INTEGER,
    inventory_hash TEXT,
    inventory_at_ms INTEGER,
    hostname TEXT NOT NULL DEFAULT '',
    os TEXT NOT NULL DEFAULT '',
    kernel TEXT NOT NULL DEFAULT '',
    architecture TEXT NOT NULL DEFAULT '',
    cpus INTEGER NOT NULL DEFAULT 0,
    memory_bytes INTEGER NOT NULL DEFAULT 0,
    destinations_json TEXT NOT NULL DEFAULT '[]'
) STRICT;
CREATE INDEX servers_of_company ON servers (company_id);
CREATE INDEX servers_shut_out ON servers (id) WHERE status <> 'active';

CREATE TABLE join_tokens (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    company_id INTEGER NOT NULL REFERENCES companies (id),
    server_id INTEGER REFERENCES servers (id),
    secret_sha256 TEXT NOT NULL,
    created_at_ms INTEGER NOT NULL,
    expires_at_ms INTEGER NOT NULL,
    used_at_ms INTEGER,
    used_spki_sha256 TEXT,
    used_server_id INTEGER REFERENCES servers (id)
) STRICT;

CREATE TABLE api_keys (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    -- NULL: all companies.
    company_id INTEGER REFERENCES companies (id),
    label TEXT NOT NULL,
    secret_sha256 TEXT NOT NULL,
    created_at_ms INTEGER NOT NULL,
    revoked_at_ms INTEGER
) STRICT;

CREATE TABLE services (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    server_id INTEGER NOT NULL REFERENCES servers (id),
    name TEXT NOT NULL,
    runtime TEXT NOT NULL,
    version TEXT NOT NULL,
    health TEXT NOT NULL,
    consistency TEXT NOT NULL,
    -- Set when an inventory no longer names it; the row stays, so that its id means one service for ever.
    gone_at_ms INTEGER,
    UNIQUE (server_id, name)
) STRICT;

CREATE TABLE server_grants (
    server_id INTEGER NOT NULL REFERENCES servers (id),
    service TEXT NOT NULL,
    verb TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (server_id, service, verb)
) STRICT, WITHOUT ROWID;

CREATE TABLE snapshot_policies (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    server_id INTEGER NOT NULL REFERENCES servers (id),
    service TEXT NOT NULL,
    cron TEXT NOT NULL,
    time_zone TEXT NOT NULL,
    retention_days INTEGER NOT NULL,
    retention_count INTEGER NOT NULL,
    destination TEXT NOT NULL,
    encryption_enabled INTEGER NOT NULL,
    misfire TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('pending', 'applied', 'refused')),
    refusal_code TEXT NOT NULL DEFAULT '',
    refusal_message TEXT NOT NULL DEFAULT '',
    -- The newest directive; answers to older ones no longer touch the policy.
    directive_id TEXT NOT NULL,
    updated_at_ms INTEGER NOT NULL,
    UNIQUE (server_id, service)
) STRICT;

CREATE TABLE directives (
    id TEXT PRIMARY KEY,
    server_id INTEGER NOT NULL REFERENCES servers (id),
    kind TEXT NOT NULL CHECK (kind IN ('run', 'policy')),
    service TEXT NOT NULL,
    -- Of a run: a word of the closed list, kept as text so that an unknown one is refused by the host.
    verb TEXT NOT NULL DEFAULT '',
    created_at_ms INTEGER NOT NULL,
    expires_at_ms INTEGER NOT NULL,
    delivered_at_ms INTEGER,
    -- An outcome or a run came, it expired, or a newer policy took its place.
    answered_at_ms INTEGER,
    answer TEXT NOT NULL DEFAULT '' CHECK (answer IN ('', 'accepted', 'refused', 'expired', 'superseded')),
    code TEXT NOT NULL DEFAULT '',
    message TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE INDEX directives_open ON directives (server_id, created_at_ms) WHERE answered_at_ms IS NULL;

CREATE TABLE snapshot_runs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    server_id INTEGER NOT NULL REFERENCES servers (id),
    -- Made by the agent; NULL while only the centre knows of the run.
    run_uid TEXT,
    directive_id TEXT UNIQUE,
    policy_id INTEGER,
    service TEXT NOT NULL,
    kind TEXT NOT NULL,
    scope TEXT NOT NULL DEFAULT '',
    job_type TEXT NOT NULL DEFAULT '',
    status TEXT NOT NULL CHECK (status IN ('queued', 'running', 'success', 'failed')),
    phase TEXT NOT NULL DEFAULT '',
    error_class TEXT NOT NULL DEFAULT '',
    error_message TEXT NOT NULL DEFAULT '',
    queued_at_ms INTEGER,
    started_at_ms INTEGER,
    finished_at_ms INTEGER,
    received_at_ms INTEGER NOT NULL,
    consistency_requested TEXT NOT NULL DEFAULT '',
    consistency_achieved TEXT NOT NULL DEFAULT '',
    freeze_ms INTEGER NOT NULL DEFAULT 0,
    duration_ms INTEGER NOT NULL DEFAULT 0,
    bytes_read INTEGER NOT NULL DEFAULT 0,
    bytes_stored INTEGER NOT NULL DEFAULT 0,
    size_bytes INTEGER NOT NULL DEFAULT 0,
    files INTEGER NOT NULL DEFAULT 0,
    unreadable INTEGER NOT NULL DEFAULT 0,
    vanished INTEGER NOT NULL DEFAULT 0,
    unreadable_names_json TEXT NOT NULL DEFAULT '[]',
    checksum TEXT NOT NULL DEFAULT '',
    artifact_url TEXT NOT NULL DEFAULT '',
    verified_at_ms INTEGER,
    destination TEXT NOT NULL DEFAULT '',
    repository_bytes INTEGER NOT NULL DEFAULT 0,
    repository_id TEXT NOT NULL DEFAULT '',
    log_tail TEXT NOT NULL DEFAULT '',
    warnings_json TEXT NOT NULL DEFAULT '[]',
    expired_at_ms INTEGER,
    -- Not unique by itself: a host that learns another's run_uid must not be able to take it first.
    UNIQUE (server_id, run_uid)
) STRICT;
CREATE INDEX runs_of_server ON snapshot_runs (server_id, id);
CREATE INDEX runs_by_status ON snapshot_runs (status);

-- What a repository holds after the newest success that wrote to it; `as_of_ms` is the receiver's clock.
CREATE TABLE repositories (
    server_id INTEGER NOT NULL REFERENCES servers (id),
    repository_id TEXT NOT NULL,
    destination TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    as_of_ms INTEGER NOT NULL,
    PRIMARY KEY (server_id, repository_id)
) STRICT, WITHOUT ROWID;

-- Append-only: a correction is a new row.
CREATE TABLE cost_ledger (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    server_id INTEGER NOT NULL REFERENCES servers (id),
    ref_date TEXT NOT NULL,
    amount TEXT NOT NULL,
    -- ISO 4217. Amounts of different currencies are never added up.
    currency TEXT NOT NULL,
    source TEXT NOT NULL,
    run_uid TEXT,
    metadata_json TEXT NOT NULL,
    booked_at_ms INTEGER NOT NULL,
    -- One row a run; see snapshot_runs for why the server is part of it.
    UNIQUE (server_id, run_uid)
) STRICT;
CREATE INDEX ledger_of_day ON cost_ledger (server_id, ref_date, source);
CREATE TRIGGER cost_ledger_is_never_changed BEFORE UPDATE ON cost_ledger
BEGIN SELECT RAISE(ABORT, 'cost_ledger is append-only'); END;
CREATE TRIGGER cost_ledger_is_never_shortened BEFORE DELETE ON cost_ledger
BEGIN SELECT RAISE(ABORT, 'cost_ledger is append-only'); END;

CREATE TABLE usage_hours (
    server_id INTEGER NOT NULL REFERENCES servers (id),
    hour_start_ms INTEGER NOT NULL,
    observed_seconds INTEGER NOT NULL,
    cpu_core_seconds REAL NOT NULL,
    memory_byte_seconds REAL NOT NULL,
    disk_used_bytes INTEGER NOT NULL,
    network_sent_bytes INTEGER NOT NULL,
    received_at_ms INTEGER NOT NULL,
    UNIQUE (server_id, hour_start_ms)
) STRICT;

CREATE TABLE repository_keys (
    server_id INTEGER NOT NULL REFERENCES servers (id),
    repository_id TEXT NOT NULL,
    destination TEXT NOT NULL,
    -- Encrypted for the company's recovery key, or open where the host switched encryption off.
    wrapped BLOB,
    open TEXT,
    received_at_ms INTEGER NOT NULL,
    PRIMARY KEY (server_id, repository_id),
    CHECK ((wrapped IS NULL) <> (open IS NULL))
) STRICT, WITHOUT ROWID;

-- Every report ever committed, by number and hash: the memory that makes delivery exactly once.
CREATE TABLE reports (
    server_id INTEGER NOT NULL,
    epoch TEXT NOT NULL,
    seq INTEGER NOT NULL,
    sha256 BLOB NOT NULL,
    peer TEXT NOT NULL,
    received_at_ms INTEGER NOT NULL,
    PRIMARY KEY (server_id, epoch, seq)
) STRICT, WITHOUT ROWID;

-- Reports with a good number and hash that this receiver could not read: kept as they came, for a newer one.
CREATE TABLE unreadable_reports (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    server_id INTEGER NOT NULL REFERENCES servers (id),
    epoch TEXT NOT NULL,
    seq INTEGER NOT NULL,
    why TEXT NOT NULL,
    body BLOB NOT NULL,
    received_at_ms INTEGER NOT NULL
) STRICT;
CREATE INDEX unreadable_of_server ON unreadable_reports (server_id, id);

CREATE TABLE report_epochs (
    server_id INTEGER NOT NULL REFERENCES servers (id),
    epoch TEXT NOT NULL,
    -- All of 1..=acked_seq are in reports.
    acked_seq INTEGER NOT NULL,
    PRIMARY KEY (server_id, epoch)
) STRICT, WITHOUT ROWID;

-- One row a server and minute, averaged over that minute's heartbeats; counters as last seen.
CREATE TABLE server_samples (
    server_id INTEGER NOT NULL,
    minute INTEGER NOT NULL,
    heartbeats INTEGER NOT NULL,
    load1 REAL NOT NULL,
    load5 REAL NOT NULL,
    load15 REAL NOT NULL,
    cpu_busy REAL NOT NULL,
    memory_total_bytes INTEGER NOT NULL,
    memory_used_bytes INTEGER NOT NULL,
    disk_total_bytes INTEGER NOT NULL,
    disk_used_bytes INTEGER NOT NULL,
    network_received_bytes INTEGER NOT NULL,
    network_sent_bytes INTEGER NOT NULL,
    uptime_seconds INTEGER NOT NULL,
    runs_active INTEGER NOT NULL,
    outbox_reports INTEGER NOT NULL,
    PRIMARY KEY (server_id, minute)
) STRICT, WITHOUT ROWID;
CREATE INDEX samples_by_age ON server_samples (minute);

CREATE TABLE idempotency_keys (
    server_id INTEGER NOT NULL REFERENCES servers (id),
    key TEXT NOT NULL,
    body_sha256 TEXT NOT NULL,
    run_id INTEGER NOT NULL REFERENCES snapshot_runs (id),
    created_at_ms INTEGER NOT NULL,
    PRIMARY KEY (server_id, key)
) STRICT, WITHOUT ROWID;

-- Written by each check of health, so that a disk that is full is seen: a commit of nothing writes nothing.
CREATE TABLE worker_pulse (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    at_ms INTEGER NOT NULL
) STRICT;
INSERT INTO worker_pulse (id, at_ms) VALUES (1, 0);

-- Who did what, chained by hash: a row that is changed or taken out breaks every hash after it.
CREATE TABLE audit (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at_ms INTEGER NOT NULL,
    actor TEXT NOT NULL,
    company_id INTEGER,
    action TEXT NOT NULL,
    subject TEXT NOT NULL,
    details_json TEXT NOT NULL,
    previous_hash TEXT NOT NULL,
    hash TEXT NOT NULL
) STRICT;
