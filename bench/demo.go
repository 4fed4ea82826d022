package bench

import (
	"context"
	"fmt"
	"net/http"
	"slices"

	"github.com/hearth-serverless/hearth/gateway"
	"github.com/hearth-serverless/hearth/internal/waterfall"
)

const demoRounds = 5

// demoSuite is the start suite, told as a story: few rounds, and at the end where one cold start spent its time.
func demoSuite(ctx context.Context, o *Options, r *Report) error {
	return withStarter(ctx, o, r, func(s *starter) error {
		o.say("starting %s %d times cold and from the pool; beside it the bare process", s.function, demoRounds)
		for round := range demoRounds {
			if err := s.round(ctx, round, s.process, s.sandbox, s.cold); err != nil {
				return fmt.Errorf("round %d: %w", round+1, err)
			}
		}
		if err := s.warm(ctx, 500); err != nil {
			return err
		}
		return s.waterfall(ctx)
	})
}

// waterfall draws one more cold start, traced by every daemon on its way.
func (s *starter) waterfall(ctx context.Context) error {
	if err := s.reset(ctx, true); err != nil {
		return err
	}
	client := newClient()
	defer client.CloseIdleConnections()
	took, header, err := firstByte(ctx, client, s.stack.url(s.function), http.Header{gateway.TraceHeader: {"1"}})
	if err != nil {
		return fmt.Errorf("trace a cold start: %w", err)
	}
	phases, err := gateway.ParseTiming(header.Values("Server-Timing"))
	if err != nil {
		return err
	}
	seen := map[string]bool{}
	chart := waterfall.Chart{Title: fmt.Sprintf("one cold start of %s: %.0f ms to the first byte", s.function, ms(took))}
	for _, p := range phases {
		seen[p.Name] = true
		chart.Phases = append(chart.Phases, waterfall.Phase(p))
	}
	wanted := []string{"resolve", "fetch", "decompress", "unpack", "sandbox", "create", "process", "first_byte"}
	if missing := slices.DeleteFunc(wanted, func(name string) bool { return seen[name] }); len(missing) > 0 {
		return fmt.Errorf("the trace of a cold start lacks %v; it has %v", missing, phases)
	}
	fmt.Fprintln(s.o.Progress)
	return chart.Write(s.o.Progress)
}
