package gateway

import (
	"context"
	"math/rand/v2"
	"time"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

const (
	minReconnect = 50 * time.Millisecond
	maxReconnect = 2 * time.Second
)

// watch follows poolmanager's events until ctx is done, over as many streams as that takes. Between two streams the table
// stays as it is.
func (g *Gateway) watch(ctx context.Context) {
	pause := minReconnect
	for ctx.Err() == nil {
		g.table.begin()
		err := g.config.Pool.Watch(ctx, g.config.Name, func(m *hearthv1.WatchResponse) {
			if m.GetSynced() {
				pause = minReconnect
				g.metrics.connected.Set(1)
			}
			g.table.event(m, time.Now())
		})
		g.metrics.connected.Set(0)
		if ctx.Err() != nil {
			return
		}
		if pause == minReconnect {
			g.config.Logger.Warn("watch of poolmanager ended: going on with what is known", "err", err)
		}
		if !sleep(ctx, pause/2+rand.N(pause/2)) {
			return
		}
		pause = min(2*pause, maxReconnect)
	}
}
