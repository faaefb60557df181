/*
 * The scenario of conversion.py, step for step, for Spin.
 *
 * Why both have the same states. The shared variables are the same bytes. Each primitive of the Python procedures is
 * one d_step here: one transition, enabled exactly when the primitive does not wait. A party of the Python model
 * remembers where it stands and its round, because it acts on what it reads before its next step; so does a process
 * here: its control state, and `r`. Branches that meet again in Python (an unlock reached with and without the page
 * converted) meet at the same control state. No process is created or dies: each is active from the beginning and ends
 * in a statement that is never executable, so no state differs by bookkeeping. Hence a bijection of states that carries
 * transitions to transitions, and equal counts, which engine.py and tests/test_bench_model.py check.
 *
 * Compile with -DNOREDUCE for the comparison: the explorer has no partial-order reduction.
 */

#ifndef VCPU_ROUNDS
#define VCPU_ROUNDS 1
#endif
#ifndef STRAY_ROUNDS
#define STRAY_ROUNDS 2
#endif

byte invalidate;                        /* who holds the invalidate lock, 0 for nobody */
byte owner[2], direct[2] = 1, stale[2]; /* 1: the guest's; in the direct map; in some TLB after it has left it */
byte user[2], gmap[2];                  /* mapped by the VMM; by the guest's stage 2 */
byte refs[2], lock[2];                  /* references beyond the page cache's; who holds the folio lock */

#define done end: (false)

inline lock_invalidate(me) { d_step { invalidate == 0 -> invalidate = me } }
inline unlock_invalidate() { d_step { invalidate = 0 } }
inline unlock_folio(p)     { d_step { lock[p] = 0 } }

inline to_private(me, p) {
    lock_invalidate(me);
    if
    :: d_step { lock[p] == 0 && owner[p] == 0 -> lock[p] = me };
       d_step { user[p] = 0 };
       if
       :: d_step { refs[p] == 0 -> skip };
          d_step { direct[p] = 0; stale[p] = 1 };
          d_step { stale[p] = 0 };
          d_step { owner[p] = 1 }
       :: d_step { refs[p] != 0 -> skip }
       fi
    :: d_step { lock[p] == 0 && owner[p] == 1 -> lock[p] = me }
    fi;
    unlock_folio(p);
    unlock_invalidate();
    done
}

inline to_shared(me, p) {
    lock_invalidate(me);
    if
    :: d_step { lock[p] == 0 && owner[p] == 1 -> lock[p] = me };
       d_step { owner[p] = 0; gmap[p] = 0 };
       d_step { direct[p] = 1 }
    :: d_step { lock[p] == 0 && owner[p] == 0 -> lock[p] = me }
    fi;
    unlock_folio(p);
    unlock_invalidate();
    done
}

inline vcpu(me, p, rounds) {
end: do
    :: d_step { r < rounds && gmap[p] -> r++ }
    :: d_step { r < rounds && !gmap[p] -> skip };
       d_step { refs[p]++ };
       d_step { lock[p] == 0 -> lock[p] = me };
       d_step { gmap[p] = 1 };
       unlock_folio(p);
       d_step { refs[p]--; r++ }
    od
}

inline gup(me, p) {
    if
    :: d_step { lock[p] == 0 && owner[p] == 0 -> lock[p] = me };
       d_step { user[p] = 1 }
    :: d_step { lock[p] == 0 && owner[p] == 1 -> lock[p] = me }
    fi;
    unlock_folio(p);
    if
    :: d_step { user[p] == 0 -> skip }
    :: d_step { user[p] == 1 -> skip };
       d_step { refs[p]++ };
       if
       :: d_step { user[p] == 1 -> skip };
          d_step { assert(owner[p] == 0) };
          d_step { refs[p]-- }
       :: d_step { user[p] == 0 -> refs[p]-- }
       fi
    fi;
    done
}

inline stray(p, rounds) {
end: do
    :: d_step { r < rounds -> assert(!((direct[p] || stale[p]) && owner[p])); r++ }
    od
}

active proctype to_private_0() { to_private(1, 0) }
active proctype gup_0()        { gup(2, 0) }
active proctype vcpu_0()       { byte r; vcpu(3, 0, VCPU_ROUNDS) }
active proctype stray_0()      { byte r; stray(0, STRAY_ROUNDS) }
#ifndef SMALL
active proctype to_shared_0()  { to_shared(5, 0) }
active proctype to_private_1() { to_private(6, 1) }
active proctype vcpu_1()       { byte r; vcpu(7, 1, VCPU_ROUNDS) }
#endif
