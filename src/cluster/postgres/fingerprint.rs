//! Computes one number for the form of the primary's tables and of everything that belongs to them.
//! It is compared only with an earlier answer of the same server, so differences between versions
//! do not matter.

use super::session::Session;
use crate::cluster::postgres::datastore_error::DatastoreError;

/// The path decides whether names in definitions are written in full. A role or a database may
/// change it at any time.
const PATH: &str = "SELECT set_config('search_path', 'pg_catalog', false)";

/// Everything that gives a row its meaning, and that a promoted spare needs. Objects of an
/// extension count by the extension's version. Owners and privileges do not count, because they are
/// not copied.
const FINGERPRINT: &str = "
WITH ours AS (
    SELECT oid, nspname FROM pg_namespace
    WHERE nspname NOT IN ('information_schema', 'warm_spare') AND nspname !~ '^pg_'),
brought AS (
    SELECT classid, objid FROM pg_depend WHERE deptype = 'e'),
lines AS (
    SELECT concat_ws(' ', 'column', n.nspname, c.relname, c.relkind, c.relpersistence, a.attnum, a.attname,
        format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity, a.attgenerated, a.attcollation::regcollation,
        pg_get_expr(d.adbin, d.adrelid)) AS line
    FROM ours n JOIN pg_class c ON c.relnamespace = n.oid AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'c')
    LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    UNION ALL SELECT concat_ws(' ', 'table', n.nspname, c.relname, c.relrowsecurity, c.relforcerowsecurity,
        pg_get_expr(c.relpartbound, c.oid), pg_get_partkeydef(c.oid), i.inhparent::regclass, i.inhseqno,
        CASE WHEN c.relkind = 'v' THEN c.reloptions::text END)
    FROM ours n JOIN pg_class c ON c.relnamespace = n.oid AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
    LEFT JOIN pg_inherits i ON i.inhrelid = c.oid
    UNION ALL SELECT concat_ws(' ', 'constraint', n.nspname, conrelid::regclass, contypid::regtype, conname, convalidated,
        pg_get_constraintdef(k.oid))
    FROM pg_constraint k JOIN ours n ON n.oid = k.connamespace
    UNION ALL SELECT concat_ws(' ', 'index', pg_get_indexdef(i.indexrelid))
    FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid JOIN ours n ON n.oid = c.relnamespace WHERE i.indisvalid
    UNION ALL SELECT concat_ws(' ', 'label', n.nspname, t.typname, e.enumsortorder, e.enumlabel)
    FROM pg_enum e JOIN pg_type t ON t.oid = e.enumtypid JOIN ours n ON n.oid = t.typnamespace
    UNION ALL SELECT concat_ws(' ', 'domain', n.nspname, t.typname, format_type(t.typbasetype, t.typtypmod), t.typnotnull,
        t.typcollation::regcollation, t.typdefault)
    FROM pg_type t JOIN ours n ON n.oid = t.typnamespace WHERE t.typtype = 'd'
    UNION ALL SELECT concat_ws(' ', 'range', n.nspname, t.typname, to_jsonb(r))
    FROM pg_range r JOIN pg_type t ON t.oid = r.rngtypid JOIN ours n ON n.oid = t.typnamespace
    UNION ALL SELECT concat_ws(' ', 'function', n.nspname, p.oid::regprocedure,
        md5(CASE p.prokind WHEN 'a' THEN to_jsonb(g)::text ELSE pg_get_functiondef(p.oid) END))
    FROM pg_proc p JOIN ours n ON n.oid = p.pronamespace LEFT JOIN pg_aggregate g ON g.aggfnoid = p.oid
    WHERE ('pg_proc'::regclass, p.oid) NOT IN (SELECT classid, objid FROM brought)
    UNION ALL SELECT concat_ws(' ', 'trigger', t.tgenabled, pg_get_triggerdef(t.oid))
    FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN ours n ON n.oid = c.relnamespace
    WHERE NOT t.tgisinternal
    UNION ALL SELECT concat_ws(' ', 'event trigger', evtname, evtevent, evtfoid::regproc, evtenabled, evttags)
    FROM pg_event_trigger WHERE ('pg_event_trigger'::regclass, oid) NOT IN (SELECT classid, objid FROM brought)
    UNION ALL SELECT concat_ws(' ', 'view', n.nspname, c.relname, md5(pg_get_viewdef(c.oid)))
    FROM pg_class c JOIN ours n ON n.oid = c.relnamespace WHERE c.relkind IN ('v', 'm')
    UNION ALL SELECT concat_ws(' ', 'rule', r.ev_enabled, pg_get_ruledef(r.oid))
    FROM pg_rewrite r JOIN pg_class c ON c.oid = r.ev_class JOIN ours n ON n.oid = c.relnamespace
    WHERE r.rulename <> '_RETURN'
    UNION ALL SELECT concat_ws(' ', 'policy', n.nspname, c.relname, l.polname, l.polcmd, l.polpermissive,
        (SELECT string_agg(CASE role WHEN 0 THEN 'public' ELSE role::regrole::text END, ',' ORDER BY 1) FROM unnest(l.polroles) role),
        pg_get_expr(l.polqual, l.polrelid), pg_get_expr(l.polwithcheck, l.polrelid))
    FROM pg_policy l JOIN pg_class c ON c.oid = l.polrelid JOIN ours n ON n.oid = c.relnamespace
    UNION ALL SELECT concat_ws(' ', 'sequence', n.nspname, c.relname, s.seqtypid::regtype, s.seqstart, s.seqincrement,
        s.seqmax, s.seqmin, s.seqcache, s.seqcycle)
    FROM pg_sequence s JOIN pg_class c ON c.oid = s.seqrelid JOIN ours n ON n.oid = c.relnamespace
    UNION ALL SELECT concat_ws(' ', 'extension', extname, extversion) FROM pg_extension
    UNION ALL SELECT concat_ws(' ', 'schema', nspname) FROM ours
    -- Rare, and told apart by what the server itself has on record of them.
    UNION ALL SELECT concat_ws(' ', 'cast', castsource::regtype, casttarget::regtype, castfunc::regprocedure, castcontext, castmethod)
    FROM pg_cast WHERE oid >= 16384 AND ('pg_cast'::regclass, oid) NOT IN (SELECT classid, objid FROM brought)
    UNION ALL SELECT concat_ws(' ', 'operator', to_jsonb(o) - 'oprowner') FROM pg_operator o JOIN ours n ON n.oid = o.oprnamespace
    WHERE ('pg_operator'::regclass, o.oid) NOT IN (SELECT classid, objid FROM brought)
    UNION ALL SELECT concat_ws(' ', 'operator class', to_jsonb(o) - 'opcowner') FROM pg_opclass o JOIN ours n ON n.oid = o.opcnamespace
    WHERE ('pg_opclass'::regclass, o.oid) NOT IN (SELECT classid, objid FROM brought)
    UNION ALL SELECT concat_ws(' ', 'collation', to_jsonb(o) - 'collowner') FROM pg_collation o JOIN ours n ON n.oid = o.collnamespace
    WHERE ('pg_collation'::regclass, o.oid) NOT IN (SELECT classid, objid FROM brought)
    UNION ALL SELECT concat_ws(' ', 'text search', to_jsonb(o) - 'cfgowner',
        (SELECT jsonb_agg(to_jsonb(m) ORDER BY m.maptokentype, m.mapseqno) FROM pg_ts_config_map m WHERE m.mapcfg = o.oid))
    FROM pg_ts_config o JOIN ours n ON n.oid = o.cfgnamespace
    WHERE ('pg_ts_config'::regclass, o.oid) NOT IN (SELECT classid, objid FROM brought)
    UNION ALL SELECT concat_ws(' ', 'dictionary', to_jsonb(o) - 'dictowner') FROM pg_ts_dict o JOIN ours n ON n.oid = o.dictnamespace
    WHERE ('pg_ts_dict'::regclass, o.oid) NOT IN (SELECT classid, objid FROM brought)
    -- They are not copied, and a copy refuses them.
    UNION ALL SELECT concat_ws(' ', 'large objects', count(*), max(oid)) FROM pg_largeobject_metadata
    -- What the publication leaves out is left out without a word. As JSON, for its columns differ from version to version.
    UNION ALL SELECT concat_ws(' ', 'publication', to_jsonb(p)) FROM pg_publication p WHERE p.pubname = $1
    UNION ALL SELECT concat_ws(' ', 'published', to_jsonb(r)) FROM pg_publication_rel r
    JOIN pg_publication p ON p.oid = r.prpubid WHERE p.pubname = $1)
SELECT coalesce(md5(string_agg(line, E'\\n' ORDER BY line)), '') FROM lines";

impl Session {
    /// Returns the fingerprint as the session's transaction sees it. After it the session finds
    /// unqualified names only in the system's catalog.
    pub async fn fingerprint(&self, publication: &str) -> Result<String, DatastoreError> {
        let doing = "reading the form of the tables";
        self.rows(doing, PATH, &[]).await?;
        let row = self.row(doing, FINGERPRINT, &[&publication]).await?;
        row.get(0)
    }
}
