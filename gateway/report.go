package gateway

import (
	"context"
	"maps"
	"time"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

const (
	reportInterval = time.Second
	reportTime     = 2 * time.Second       // bounds one call
	urgentInterval = 20 * time.Millisecond // between reports of first requests
)

// report sends load each second, and soon for the first request of an idle Function and to acknowledge events, until ctx is
// done. One after the other: poolmanager must not see an older sample after a newer one.
func (g *Gateway) report(ctx context.Context) {
	tick := time.NewTicker(reportInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			g.send(ctx, false)
			continue
		case <-g.urgent:
			// First the start that the same request sets off: it is on its way to poolmanager too.
			if !sleep(ctx, urgentInterval) {
				return
			}
			g.send(ctx, true)
		case <-g.news:
			g.send(ctx, false)
			if !sleep(ctx, urgentInterval) {
				return
			}
		}
	}
}

// hurry has the reporter look for urgent load.
func (g *Gateway) hurry() { signal(g.urgent) }

// tell has the reporter acknowledge events: whoever deploys a Function waits until gateways know of it, and an Instance is drained
// once they know of that.
func (g *Gateway) tell() { signal(g.news) }

func signal(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// send makes one report. What could not be delivered stays in the meters, and comes with the next, over a longer interval.
func (g *Gateway) send(ctx context.Context, urgentOnly bool) {
	ctx, cancel := context.WithTimeout(ctx, reportTime)
	defer cancel()
	req := &hearthv1.ReportRequest{Subscriber: g.config.Name}
	if !urgentOnly { // what is left out would count as idle, and its Instances as drained
		req.Version = g.table.ack() // before any load is read
	}
	type reading struct {
		function *function
		sample   sample
	}
	var readings []reading
	loads := map[string]*hearthv1.Load{}
	for _, f := range g.table.all() {
		if urgentOnly && !f.isUrgent() {
			continue
		}
		load, sample, worth := f.load(time.Now())
		if !worth {
			f.skipped(sample)
			continue
		}
		if prior := loads[load.GetFunction()]; prior != nil { // a function deleted and made again meanwhile
			maps.Copy(prior.GetInFlight(), load.GetInFlight())
			continue
		}
		loads[load.GetFunction()] = load
		req.Loads = append(req.Loads, load)
		readings = append(readings, reading{f, sample})
	}
	if urgentOnly && len(readings) == 0 {
		return
	}
	if err := g.config.Pool.Report(ctx, req); err != nil {
		g.config.Logger.Debug("load not delivered", "err", err)
		return
	}
	for _, r := range readings {
		r.function.delivered(r.sample)
	}
}
