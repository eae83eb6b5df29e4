/* The SQL functions behind sql/adaptive_lwlock--*.sql. */

#include "backend_mirror.h"
#include "module.h"
#include "server/server.h"
#include "settings.h"
#include "stats.h"

using namespace adaptive;

extern "C" {
PG_FUNCTION_INFO_V1(adaptive_lwlock_status);
PG_FUNCTION_INFO_V1(adaptive_lwlock_backends);
PG_FUNCTION_INFO_V1(pg_stat_adaptive_lwlock);
PG_FUNCTION_INFO_V1(pg_stat_adaptive_lwlock_reset);
PG_FUNCTION_INFO_V1(pg_stat_adaptive_lwlock_reset_time);
}

namespace {

void require_preload() {
    if (!module::preloaded())
        ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
                        errmsg("adaptive_lwlock must be loaded via shared_preload_libraries")));
}

/// A row under construction: values in column order.
template <int kColumns>
class Row {
  public:
    void add(Datum value) { values_[n_++] = value; }
    void add_text(const char* text) {
        if (text == nullptr)
            add_null();
        else
            add(CStringGetTextDatum(text));
    }
    void add_null() { nulls_[n_++] = true; }

    Datum* values() { return values_; }
    bool* nulls() { return nulls_; }

  private:
    Datum values_[kColumns] = {};
    bool nulls_[kColumns] = {};
    int n_ = 0;
};

}  // namespace

Datum adaptive_lwlock_status(PG_FUNCTION_ARGS) {
    require_preload();
    TupleDesc row_type;
    if (get_call_result_type(fcinfo, nullptr, &row_type) != TYPEFUNC_COMPOSITE)
        elog(ERROR, "return type must be a row type");

    const module::Status status = module::status();
    const backend_mirror::Status mirror = backend_mirror::status();
    Row<9> row;
    row.add(BoolGetDatum(status.active));
    row.add_text(status.reason);
    row.add_text(mirror.source);
    row.add_text(mirror.source_reason);
    row.add_text(settings::mode_name());
    row.add_text(GetConfigOption("server_version", false, false));
    row.add(Int32GetDatum(status.functions_replaced));
    row.add(Int32GetDatum(static_cast<int32>(mirror.slots_used)));
    row.add(Int32GetDatum(static_cast<int32>(mirror.slots_total)));
    return HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(row_type), row.values(), row.nulls()));
}

Datum pg_stat_adaptive_lwlock(PG_FUNCTION_ARGS) {
    require_preload();
    InitMaterializedSRF(fcinfo, 0);
    ReturnSetInfo* result = reinterpret_cast<ReturnSetInfo*>(fcinfo->resultinfo);

    for (int tranche = 0; tranche < stats::kTranches; tranche++) {
        const stats::Totals totals = stats::totals(tranche);
        bool anything = false;
        for (uint64_t n : totals.of) anything |= n != 0;
        if (!anything) continue;

        Row<9> row;
        row.add_text(tranche == stats::kOtherTranches
                         ? "(other)"
                         : GetLWLockIdentifier(PG_WAIT_LWLOCK, static_cast<uint16>(tranche)));
        for (LockEvent e :
             {LockEvent::contended, LockEvent::spin_acquired, LockEvent::owner_off_cpu,
              LockEvent::budget_spent, LockEvent::slept, LockEvent::wakeup_sent, LockEvent::wakeup_spared})
            row.add(Int64GetDatum(static_cast<int64>(totals[e])));
        row.add(Float8GetDatum(static_cast<double>(totals[LockEvent::spin_ticks]) /
                               static_cast<double>(CycleClock::ticks_per_microsecond()) / 1000.0));
        tuplestore_putvalues(result->setResult, result->setDesc, row.values(), row.nulls());
    }
    return Datum(0);
}

Datum pg_stat_adaptive_lwlock_reset(PG_FUNCTION_ARGS) {
    (void)fcinfo;
    require_preload();
    stats::reset();
    PG_RETURN_VOID();
}

Datum pg_stat_adaptive_lwlock_reset_time(PG_FUNCTION_ARGS) {
    (void)fcinfo;
    require_preload();
    PG_RETURN_TIMESTAMPTZ(stats::reset_time());
}

Datum adaptive_lwlock_backends(PG_FUNCTION_ARGS) {
    require_preload();
    InitMaterializedSRF(fcinfo, 0);
    ReturnSetInfo* result = reinterpret_cast<ReturnSetInfo*>(fcinfo->resultinfo);

    for (uint32 i = 0; i < ProcGlobal->allProcCount; i++) {
        PGPROC* proc = &ProcGlobal->allProcs[i];
        // Whoever has this PGPROC owns its latch, and gives it up at its end; the process id may stay behind.
        const int pid = proc->procLatch.owner_pid;
        if (pid == 0) continue;
        const backend_mirror::BackendSlot backend = backend_mirror::of_backend(static_cast<int>(i));

        Row<5> row;
        row.add(Int32GetDatum(pid));
        // The slot may be one in a mirror that has been unloaded since, where the number means somebody else
        // now.
        if (backend.slot == 0 || backend.info.claimant != static_cast<uint32_t>(pid)) {
            row.add_null();
            row.add_text(name_of(SchedState::unknown));
            row.add_null();
            row.add_null();
        } else {
            row.add(Int32GetDatum(backend.slot));
            row.add_text(name_of(backend.info.state));
            row.add(Int32GetDatum(static_cast<int32>(backend.info.cpu)));
            row.add(Int64GetDatum(static_cast<int64>(backend.info.switches)));
        }
        tuplestore_putvalues(result->setResult, result->setDesc, row.values(), row.nulls());
    }
    return Datum(0);
}
