package snapshotter

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
)

func TestSlotsLargestFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &slots{free: 1}
		if err := s.acquire(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
		gone, cancel := context.WithCancel(t.Context())
		var order []int64
		for _, size := range []int64{5, 40, 20, 30} {
			go func() {
				ctx := t.Context()
				if size == 40 {
					ctx = gone
				}
				if err := s.acquire(ctx, size); err != nil {
					if !errors.Is(err, context.Canceled) {
						t.Error(err)
					}
					return
				}
				order = append(order, size) // one at a time
				s.release()
			}()
		}
		synctest.Wait()
		cancel()
		synctest.Wait()
		s.release()
		synctest.Wait()
		if !slices.Equal(order, []int64{30, 20, 5}) || s.free != 1 {
			t.Errorf("order %v, %d free", order, s.free)
		}
	})
}
