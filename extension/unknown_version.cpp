/*
 * The module for a major version of PostgreSQL that has no header in server/: it leaves the server stock, and
 * says so in the log and in adaptive_lwlock_status(). Settings, functions and views exist, so that neither a
 * configuration nor a script fails.
 *
 * It is compiled where nothing is known of the server, so it uses as little of it as it can.
 */

extern "C" {
#include "postgres.h"

#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/guc.h"

PG_MODULE_MAGIC;
PGDLLEXPORT void _PG_init(void);

PG_FUNCTION_INFO_V1(adaptive_lwlock_status);
PG_FUNCTION_INFO_V1(adaptive_lwlock_backends);
PG_FUNCTION_INFO_V1(pg_stat_adaptive_lwlock);
PG_FUNCTION_INFO_V1(pg_stat_adaptive_lwlock_reset);
PG_FUNCTION_INFO_V1(pg_stat_adaptive_lwlock_reset_time);
}

#include "settings.h"

#define REASON "adaptive_lwlock does not know PostgreSQL " PG_MAJORVERSION "; it knows 15, 17 and 18"

namespace {

bool preloaded = false;

void require_preload() {
    if (!preloaded)
        ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
                        errmsg("adaptive_lwlock must be loaded via shared_preload_libraries")));
}

/// The result of a function that returns a set: no row.
Datum no_row(FunctionCallInfo fcinfo) {
    require_preload();
    reinterpret_cast<ReturnSetInfo*>(fcinfo->resultinfo)->isDone = ExprEndResult;
    PG_RETURN_NULL();
}

}  // namespace

void _PG_init(void) {
    if (!process_shared_preload_libraries_in_progress) return;
    preloaded = true;
    adaptive::settings::define();
    ereport(WARNING, (errmsg(REASON ", and leaves the server as it is")));
}

Datum adaptive_lwlock_status(PG_FUNCTION_ARGS) {
    require_preload();
    TupleDesc row_type;
    if (get_call_result_type(fcinfo, nullptr, &row_type) != TYPEFUNC_COMPOSITE)
        elog(ERROR, "return type must be a row type");

    enum { active, reason, source, source_reason, mode, server_version, functions_replaced, kColumns = 9 };
    Datum values[kColumns] = {};  // 0, false
    bool nulls[kColumns] = {};
    values[reason] = CStringGetTextDatum(REASON);
    values[source] = CStringGetTextDatum("off");
    nulls[source_reason] = true;
    values[mode] = CStringGetTextDatum(adaptive::settings::mode_name());
    values[server_version] = CStringGetTextDatum(GetConfigOption("server_version", false, false));
    return HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(row_type), values, nulls));
}

Datum pg_stat_adaptive_lwlock(PG_FUNCTION_ARGS) {
    return no_row(fcinfo);
}

Datum adaptive_lwlock_backends(PG_FUNCTION_ARGS) {
    return no_row(fcinfo);
}

Datum pg_stat_adaptive_lwlock_reset(PG_FUNCTION_ARGS) {
    (void)fcinfo;
    require_preload();
    PG_RETURN_VOID();
}

Datum pg_stat_adaptive_lwlock_reset_time(PG_FUNCTION_ARGS) {
    (void)fcinfo;
    require_preload();
    PG_RETURN_NULL();
}
