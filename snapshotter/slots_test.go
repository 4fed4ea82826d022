package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
)

func TestSlotsLargestFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSlots(1)
		if err := s.acquire(t.Context(), "a", 1, &atomic.Bool{}); err != nil {
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
				if err := s.acquire(ctx, "a", size, &atomic.Bool{}); err != nil {
					if !errors.Is(err, context.Canceled) {
						t.Error(err)
					}
					return
				}
				order = append(order, size) // one at a time
				s.release("a")
			}()
		}
		synctest.Wait()
		cancel()
		synctest.Wait()
		s.release("a")
		synctest.Wait()
		if !slices.Equal(order, []int64{30, 20, 5}) || s.free != 1 || len(s.held) != 0 {
			t.Errorf("order %v, %d free, %v held", order, s.free, s.held)
		}
	})
}

// What is known to be needed goes before what is larger, also if that becomes known while it waits.
func TestSlotsNeededFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSlots(1)
		if err := s.acquire(t.Context(), "a", 1, &atomic.Bool{}); err != nil {
			t.Fatal(err)
		}
		needed := map[int64]*atomic.Bool{}
		var order []int64
		for _, size := range []int64{5, 40, 20, 30} {
			needed[size] = &atomic.Bool{}
			go func() {
				if err := s.acquire(t.Context(), "a", size, needed[size]); err != nil {
					t.Error(err)
					return
				}
				order = append(order, size) // one at a time
				s.release("a")
			}()
			synctest.Wait()
		}
		needed[5].Store(true)
		needed[20].Store(true)
		s.release("a")
		synctest.Wait()
		if !slices.Equal(order, []int64{20, 5, 40, 30}) {
			t.Errorf("order %v", order)
		}
	})
}

// Images take turns, however many layers one has, and however large.
func TestSlotsAreSharedByImages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSlots(2)
		for range 2 { // large came first and has all
			if err := s.acquire(t.Context(), "large", 100, &atomic.Bool{}); err != nil {
				t.Fatal(err)
			}
		}
		var order []string
		ask := func(image string, sizes ...int64) {
			for _, size := range sizes {
				go func() {
					if err := s.acquire(t.Context(), image, size, &atomic.Bool{}); err != nil {
						t.Error(err)
						return
					}
					order = append(order, fmt.Sprintf("%s %d", image, size))
				}()
			}
			synctest.Wait()
		}
		ask("large", 70, 80, 90)
		ask("small", 1, 2)
		ask("third", 3)
		for _, image := range []string{"large", "large", "third", "small", "large", "small", "large", "large"} {
			s.release(image)
			synctest.Wait()
		}
		want := []string{"third 3", "large 90", "small 2", "small 1", "large 80", "large 70"}
		if !slices.Equal(order, want) || s.free != 2 || len(s.held) != 0 {
			t.Errorf("order %q, want %q; %d free, %v held", order, want, s.free, s.held)
		}
	})
}
