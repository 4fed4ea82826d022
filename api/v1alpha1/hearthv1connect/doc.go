// Package hearthv1connect has the clients and handlers of Hearth's services, generated from api/hearth/v1alpha1.
package hearthv1connect
